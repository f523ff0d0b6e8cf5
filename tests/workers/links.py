"""Measures the links of several machines, quickly; what would measure a machine is a stand-in."""

import json

from ringattn import measure_links

measure_links.SECONDS, measure_links._TURNS = 0.01, 3
measure_links._BYTES = (2**12, 2**16, 2**20)
found = measure_links.nodes(
    "cpu", lambda links: {"peak": {"fp32": 1e9}, **links}, lambda text: None
)
if found:
    print("found:", json.dumps(found), flush=True)
