# syntax=docker/dockerfile:1
# ringattn with everything that training needs, as a user without rights.
#
#   docker build -t ringattn --build-arg TORCH_INDEX=URL .                 # CPUs
#   docker build -t ringattn:cuda --build-arg VARIANT=cuda .               # NVIDIA GPUs
#   docker run --rm ringattn ringattn info
#   mkdir -p runs && docker run --rm --gpus all --ipc host -v "$PWD/runs:/home/ringattn/runs" \
#       ringattn:cuda torchrun --nproc-per-node 8 -m ringattn.training experiment=continue_llama ...
#
# TORCH_INDEX: an index with CPU builds of torch; without it pip may want a CUDA build, which the CPU
# variant refuses. `runs` has to be writable for user 1000. The CUDA variant needs no toolkit but the compiler: torch brings CUDA's libraries, Triton its own assembler.
# --ipc host: ranks of a machine exchange through shared memory.
ARG VARIANT=cpu
ARG PYTHON=3.11

# DeepSpeed and Triton compile small extensions when they are first used.
FROM python:${PYTHON}-slim-bookworm AS compiler
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

FROM compiler AS build
ARG VARIANT
ARG TORCH_INDEX=""
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /src
RUN python -m venv /opt/ringattn
ENV PATH=/opt/ringattn/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY constraints.txt ./
COPY tools/install_torch.py tools/
# First and by itself: it is the largest layer, and changes with the constraints only.
RUN if [ "$VARIANT" = cuda ]; then export ALLOW_CUDA=1; fi; \
    python tools/install_torch.py constraints.txt ${TORCH_INDEX:+"$TORCH_INDEX"}
COPY pyproject.toml README.md LICENSE ./
COPY ringattn ringattn
COPY kernels kernels
COPY configs configs
COPY hydra_plugins hydra_plugins
RUN python -m pip install -c constraints.txt '.[train,data,hf,lora,trl]'

FROM compiler AS base
RUN useradd --create-home --uid 1000 ringattn
COPY --from=build /opt/ringattn /opt/ringattn
COPY --chown=ringattn train.py /home/ringattn/
COPY --chown=ringattn examples /home/ringattn/examples
ENV PATH=/opt/ringattn/bin:$PATH PYTHONUNBUFFERED=1

FROM base AS cpu
ENV DS_ACCELERATOR=cpu

FROM base AS cuda
# What NVIDIA's container runtime hands to the container.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# hadolint ignore=DL3006
FROM ${VARIANT}
USER 1000
WORKDIR /home/ringattn
CMD ["ringattn", "info"]
