"""Runs the unmodified sources of the Gluon kernels on the CPU, to find races and deadlocks.

Every partition of every resident program is a greenlet. One runs at a time; at each operation on
memory or barriers a seeded choice says who goes on: a partition, or a copy of the TMA engine, which
may be late. What is checked:

- A wgmma is computed when it is issued and again when it is waited for; the two must be equal. Its
  result is no block before that wait. So operands that change too early, and a missing wait, show.
- A TMA load fills its destination with NaN when it is issued, and with data when it completes.
- Between an ordinary access to shared memory and one of the async proxy (wgmma, TMA) there must be
  a fence.
- Barriers count arrivals and bytes; too many arrivals, a deadlock, and work in flight at the end
  are errors.

Not modelled: threads within a partition (Gluon puts barriers before its arrivals itself), layouts,
registers, memory order between programs, speed.
"""

import ast
import math
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from ringattn.kernels import gluon, work

ROOM = Path(gluon.__file__).parent


class Race(Exception):
    """What the hardware would do wrong, or wait for without end."""


class Agent(greenlet):
    """A partition of a program, or a program before it has partitions."""

    def __init__(self, machine: "Machine", program: int, body: Callable, args: Any) -> None:
        super().__init__(self.work, machine.home)
        self.machine, self.program, self.name = machine, program, body.__name__
        self.body, self.args = body, args
        self.until: Callable[[], bool] = lambda: True
        self.why = "start"
        self.products: list[Product] = []
        self.stores: list[Copy] = []
        self.touched: list[Shared] = []  # by ordinary accesses, since the last fence
        self.done = False
        self.weight = 10 ** machine.random.uniform(-1.5, 0)  # some are slow

    def work(self) -> None:
        self.body(**self.args) if isinstance(self.args, dict) else self.body(*self.args)
        if self.products or any(not store.done for store in self.stores):
            raise Race(f"{self.name}: wgmma or TMA stores in flight at the end")
        self.done = True

    def pause(self, why: str = "", until: Callable[[], bool] = lambda: True) -> None:
        self.why, self.until = why, until
        self.machine.home.switch()


def me() -> Agent:
    return getcurrent()


class Machine:
    """A GPU: resident programs, and copies on their way."""

    def __init__(self, seed: int, programs: int, resident: int) -> None:
        self.random, self.home = random.Random(seed), getcurrent()
        self.programs, self.resident = programs, resident
        self.agents: list[Agent] = []
        self.copies: list[Copy] = []
        self.late = 10 ** self.random.uniform(-2, 0.5)

    def run(self, start: Callable, args: dict) -> None:
        """All programs, started in any order, at most ``resident`` at a time."""
        waiting = self.random.sample(range(self.programs), self.programs)
        while True:
            self.agents = [agent for agent in self.agents if not agent.done]
            while waiting and len({agent.program for agent in self.agents}) < self.resident:
                self.agents.append(Agent(self, waiting.pop(), start, args))
            if not self.agents and not self.copies:
                return
            able = [(agent, agent.weight) for agent in self.agents if agent.until()]
            able += [(copy, self.late) for copy in self.copies]
            if not able:
                waits = (f"{a.program} {a.name} {a.why}" for a in self.agents)
                raise Race("deadlock: " + "; ".join(waits))
            things, weights = zip(*able, strict=True)
            (chosen,) = self.random.choices(things, weights)
            if isinstance(chosen, Agent):
                chosen.switch()  # an exception in it arrives here
            else:
                chosen.step()
                if chosen.done:
                    self.copies.remove(chosen)


class Copy:
    """An operation of the TMA engine: steps that happen some time later, in this order."""

    def __init__(self, *steps: Callable[[], None]) -> None:
        self.steps, self.at = steps, 0
        me().machine.copies.append(self)

    @property
    def read(self) -> bool:
        return self.at >= 1

    @property
    def done(self) -> bool:
        return self.at == len(self.steps)

    def step(self) -> None:
        self.steps[self.at]()
        self.at += 1


class Block(torch.Tensor):
    """A block of values; what a kernel asks of one beyond torch's methods."""

    @property
    def type(self) -> Any:
        return SimpleNamespace(layout=LAYOUT)


def block(x: torch.Tensor) -> Block:
    return x.as_subclass(Block)


class Layout:
    """Says nothing, and so do its parts."""

    def __getattr__(self, name: str) -> "Layout":
        return self


LAYOUT = Layout()


class Shared:
    """A view of shared memory. What has to be fenced is kept per buffer of a ring."""

    def __init__(self, data: torch.Tensor, whole: "Shared | None" = None) -> None:
        self.data, self.whole = data, whole or self
        self.shape, self.dtype, self.layout = list(data.shape), data.dtype, LAYOUT
        self.parts: dict[int, Shared] = {}
        self.writers: set[Agent] = set()
        self.readers: set[Agent] = set()

    def index(self, i: int) -> "Shared":
        if i not in self.parts:
            self.parts[i] = Shared(self.data[i])
        return self.parts[i]

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.data.permute(order), self.whole)

    def reshape(self, shape: list[int]) -> "Shared":
        return Shared(self.data.view(shape), self.whole)

    def load(self, layout: Any = None) -> Block:
        me().pause()
        if self.data.isnan().any():
            raise Race("reads shared memory that is not written, or that a TMA load is writing to")
        self.whole.readers.add(me())
        me().touched.append(self.whole)
        return block(self.data.clone())

    def store(self, value: torch.Tensor) -> None:
        me().pause()
        self.data.copy_(value)
        self.whole.writers.add(me())
        me().touched.append(self.whole)

    def asynchronous(self, write: bool = False) -> torch.Tensor:
        """The data as the async proxy sees it."""
        if self.whole.writers or (write and self.whole.readers):
            raise Race("the async proxy follows an ordinary access without a fence between")
        return self.data


def fence() -> None:
    agent = me()
    for part in agent.touched:
        part.writers.discard(agent)
        part.readers.discard(agent)
    agent.touched.clear()


class Barrier:
    """An mbarrier: a phase is over when all arrivals and all bytes have come."""

    def init(self, count: int) -> None:
        self.count = self.pending = count
        self.bytes = self.phase = 0

    def change(self, arrivals: int, size: int) -> None:
        self.pending -= arrivals
        self.bytes += size
        if self.pending < 0:
            raise Race("a barrier has more arrivals than its count")
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count

    @staticmethod
    def allocate(batch: int | None = None) -> Any:
        if batch is None:
            return Barrier()
        bars = [Barrier() for _ in range(batch)]
        return SimpleNamespace(index=lambda i: bars[i])

    @staticmethod
    def arrive(bar: "Barrier", count: int = 1) -> None:
        me().pause()
        bar.change(count, 0)

    @staticmethod
    def expect(bar: "Barrier", size: int) -> None:
        me().pause()
        bar.change(1, size)

    @staticmethod
    def wait(bar: "Barrier", phase: int) -> None:
        me().pause(f"waits for phase {phase}, at {bar.phase}", lambda: bar.phase & 1 != phase)


MBARRIER = SimpleNamespace(
    allocate_mbarrier=Barrier.allocate,
    init=lambda bar, count: bar.init(count),
    arrive=Barrier.arrive,
    expect=Barrier.expect,
    wait=Barrier.wait,
)


class Descriptor:
    """A tensor map: blocks of a tensor, zeros outside of it."""

    def __init__(self, tensor: torch.Tensor, shape: list[int]) -> None:
        self.tensor, self.block_shape = tensor, list(shape)
        self.dtype, self.layout = tensor.dtype, LAYOUT
        self.nbytes_per_cta = math.prod(shape) * tensor.element_size()

    def part(self, at: list[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """(the part of the tensor in the block at ``at``, the part of the block)."""
        ends = [
            min(a + b, n) for a, b, n in zip(at, self.block_shape, self.tensor.shape, strict=True)
        ]
        starts = [max(a, 0) for a in at]
        where = [slice(a, max(e, a)) for a, e in zip(starts, ends, strict=True)]
        inside = [slice(w.start - a, w.stop - a) for w, a in zip(where, at, strict=True)]
        return tuple(where), tuple(inside)


class Tma:
    @staticmethod
    def async_load(desc: Descriptor, at: list[int], bar: Barrier, to: Shared) -> None:
        to.asynchronous(write=True).fill_(math.nan)

        def arrive() -> None:
            where, inside = desc.part(at)
            to.data.zero_()
            to.data.view(desc.block_shape)[inside] = desc.tensor[where]
            bar.change(0, -desc.nbytes_per_cta)

        Copy(arrive)
        me().pause()

    @staticmethod
    def async_atomic_add(desc: Descriptor, at: list[int], source: Shared) -> None:
        where, inside = desc.part(at)
        values = []
        source.asynchronous()

        def read() -> None:
            values.append(source.asynchronous().reshape(desc.block_shape)[inside].clone())

        me().stores.append(Copy(read, lambda: desc.tensor[where].add_(values[0])))
        me().pause()

    @staticmethod
    def store_wait(pendings: int, read_only: bool = True) -> None:
        stores = me().stores[: len(me().stores) - pendings]
        me().pause(
            "waits for TMA stores",
            lambda: all(store.read if read_only else store.done for store in stores),
        )


class Product:
    """A wgmma in flight."""

    def __init__(self, a: Any, b: Shared, acc: Any, use_acc: bool) -> None:
        self.operands, self.done = (a, b, acc if use_acc else 0.0), False
        if isinstance(acc, Product) and acc not in me().products:
            raise Race("the accumulator is one of an earlier wgmma, before its wait")
        self.value = self.compute()

    def __getattr__(self, name: str) -> Any:
        raise Race(f"a wgmma's result is used (.{name}) before its wait")

    def _used(self, *_: Any) -> Any:
        raise Race("a wgmma's result is used before its wait")

    __sub__ = __rsub__ = __mul__ = __rmul__ = __add__ = __radd__ = __getitem__ = _used

    def compute(self) -> Block:
        a, b, acc = (x.asynchronous() if isinstance(x, Shared) else x for x in self.operands)
        acc = acc.value if isinstance(acc, Product) else acc
        return block(torch.Tensor(a).float() @ b.float()) + acc


def warpgroup_mma(a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Any:
    product = Product(a, b, acc, use_acc)
    if not is_async:
        return product.value
    me().products.append(product)
    me().pause()
    return product


def warpgroup_mma_wait(num_outstanding: int = 0, deps: tuple = ()) -> Any:
    products = me().products
    me().pause()
    while len(products) > num_outstanding:
        product = products.pop(0)
        product.done = True
        if not torch.equal(product.value, product.compute()):
            raise Race("a wgmma's operands changed before it was waited for")
    results = [x.value if isinstance(x, Product) and x.done else x for x in deps]
    return results[0] if len(results) == 1 else tuple(results)


class Pointer:
    """Into the flat memory of a tensor; an offset is a number or a block."""

    def __init__(self, data: torch.Tensor, at: Any = 0) -> None:
        self.data, self.at, self.dtype = data, at, SimpleNamespace(element_ty=data.dtype)

    @classmethod
    def to(cls, x: torch.Tensor) -> "Pointer":
        if not x.numel():
            return cls(x.flatten())
        size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
        return cls(x.as_strided((size,), (1,)))

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.data, self.at + offset)


def load(pointer: Pointer, mask: Any = None, other: float = 0.0) -> Any:
    me().pause()
    if not isinstance(pointer.at, torch.Tensor):
        return pointer.data[pointer.at].item()
    at = torch.Tensor(pointer.at).long()
    if mask is None:
        return block(pointer.data[at])
    mask = torch.Tensor(mask).expand(at.shape).bool()
    found = torch.full(at.shape, other, dtype=pointer.data.dtype)
    found[mask] = pointer.data[at[mask]]
    return block(found)


def store(pointer: Pointer, value: torch.Tensor, mask: torch.Tensor) -> None:
    me().pause()
    at = torch.Tensor(pointer.at).long()
    mask = torch.Tensor(mask).bool().expand(at.shape)
    pointer.data[at[mask]] = torch.Tensor(value).to(pointer.data.dtype).expand(at.shape)[mask]


def atomic_add(pointer: Pointer, value: Any, sem: str, mask: Any = None) -> int | None:
    if isinstance(value, torch.Tensor):
        # Not atomic: the kernels add where no other program does. With two, one would get lost.
        return store(pointer, load(pointer, mask) + value, mask)
    me().pause()
    before = pointer.data[pointer.at].item()
    pointer.data[pointer.at] = before + value
    return before


def atomic_xchg(pointer: Pointer, value: int, sem: str) -> int:
    me().pause()
    before = pointer.data[pointer.at].item()
    pointer.data[pointer.at] = value
    return before


def atomic_poll(pointer: Pointer, value: int, sem: str) -> None:
    me().pause(f"polls for {value}", lambda: pointer.data[pointer.at].item() == value)


def warp_specialize(parts: list, warps: list[int], registers: list[int]) -> None:
    assert len(parts) == 1 + len(warps) == 1 + len(registers)
    own = me()
    workers = [Agent(own.machine, own.program, f, args) for f, args in parts[1:]]
    own.machine.agents += workers
    parts[0][0](*parts[0][1])
    own.pause("waits for the workers", lambda: all(worker.done for worker in workers))


def either(name: str) -> Callable:
    """maximum, minimum: of numbers, or with a block."""

    def of(x: Any, y: Any) -> Any:
        if isinstance(x, torch.Tensor) or isinstance(y, torch.Tensor):
            x, y = (v if isinstance(v, torch.Tensor) else block(torch.tensor(v)) for v in (x, y))
            return getattr(torch, name)(x, y)
        return max(x, y) if name == "maximum" else min(x, y)

    return of


def where(condition: Any, x: Any, y: Any) -> Any:
    if isinstance(condition, torch.Tensor):
        return torch.where(condition, x, y)
    return x if condition else y


def reciprocal(asm: str, constraints: str, args: list, dtypes: list, **_: Any) -> tuple[Any]:
    """The only assembly that the kernels contain."""
    assert asm.startswith("rcp.approx")
    return (1 / args[0],)


GL = SimpleNamespace(
    constexpr=lambda x: x,
    static_range=range,
    int32=torch.int32,
    int64=torch.int64,
    float32=torch.float32,
    program_id=lambda axis: me().program,
    num_programs=lambda axis: me().machine.programs,
    cast=lambda x, dtype: x,
    load=load,
    store=store,
    atomic_add=atomic_add,
    atomic_xchg=atomic_xchg,
    atomic_poll=atomic_poll,
    inline_asm_elementwise=reciprocal,
    arange=lambda a, b, layout=None: block(torch.arange(a, b)),
    full=lambda shape, value, dtype, layout=None: block(torch.full(shape, value, dtype=dtype)),
    zeros=lambda shape, dtype, layout=None: block(torch.zeros(shape, dtype=dtype)),
    maximum=either("maximum"),
    minimum=either("minimum"),
    where=where,
    max=lambda x, axis: x.amax(axis) if x.dim() > 1 else x.max().item(),
    sum=lambda x, axis: x.sum(axis),
    exp2=torch.exp2,
    log2=torch.log2,
    convert_layout=lambda x, layout: x,
    allocate_shared_memory=lambda dtype, shape, layout: Shared(
        torch.full(shape, math.nan if dtype.is_floating_point else -(2**31), dtype=dtype)
    ),
    warp_specialize=warp_specialize,
    NVMMADistributedLayout=lambda *_: LAYOUT,
    NVMMASharedLayout=SimpleNamespace(get_default_for=lambda *_: LAYOUT),
    SwizzledSharedLayout=lambda *_: LAYOUT,
    BlockedLayout=lambda *_: LAYOUT,
    DotOperandLayout=lambda *_: LAYOUT,
    SliceLayout=lambda *_: LAYOUT,
)
NAMES = {
    "gl": GL,
    "gluon": SimpleNamespace(jit=lambda f=None, **_: f if f else lambda g: g),
    "work": work,
    "mbarrier": MBARRIER,
    "tma": Tma,
    "fence_async_shared": fence,
    "warpgroup_mma": warpgroup_mma,
    "warpgroup_mma_wait": warpgroup_mma_wait,
}


class _Functional(ast.NodeTransformer):
    """x += y makes a new value in Gluon; imports are given."""

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        target = ast.parse(ast.unparse(node.target), mode="eval").body
        value = ast.BinOp(target, node.op, node.value)
        return ast.copy_location(ast.Assign([node.target], value), node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        return None


class Emulator:
    """The kernels, with a mutation: (file, text that occurs once, text in its place)."""

    def __init__(self, mutation: tuple[str, str, str] | None = None) -> None:
        rooms = {"tile": dict(NAMES)}
        for file in ("tile", "fwd", "bwd"):
            names = rooms.setdefault(file, dict(rooms["tile"]))
            source = (ROOM / f"{file}.py").read_text()
            if mutation and mutation[0] == file:
                assert source.count(mutation[1]) == 1, (
                    f"{source.count(mutation[1])} x {mutation[1]}"
                )
                source = source.replace(*mutation[1:])
            tree = ast.fix_missing_locations(_Functional().visit(ast.parse(source)))
            exec(compile(tree, f"{file}.py", "exec"), names)
        self.kernels = {"forward": rooms["fwd"]["forward"], "backward": rooms["bwd"]["backward"]}

    def run(self, kernel: Any, grid: int, values: Any, seed: int, resident: int) -> None:
        """What :func:`ringattn.kernels.call.start` is given, of a Gluon kernel."""
        arguments = {}
        for name, x in zip(kernel.arg_names, values, strict=True):
            if isinstance(x, torch.Tensor):
                x = Pointer.to(x)
            elif hasattr(x, "block_shape"):
                x = Descriptor(x.base.as_strided(x.shape, x.strides), x.block_shape)
            arguments[name] = x
        with torch.no_grad():
            Machine(seed, grid, resident).run(self.kernels[kernel.fn.__name__], arguments)
