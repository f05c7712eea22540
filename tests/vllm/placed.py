"""Run by vLLM's Python: makes the placement group of an export in a Ray cluster that runs.

Prints, for each worker of the plan, the marker resources of the node that it was placed on.
"""

import json
import sys
from pathlib import Path

import ray
from ray.util.placement_group import placement_group_table

ray.init(address=sys.argv[2], log_to_driver=False)
group = ray.util.placement_group(json.loads(Path(sys.argv[1]).read_text())["ray_bundles"])
ray.get(group.ready(), timeout=60)
markers = {
    node["NodeID"]: [name for name in node["Resources"] if name.startswith("llmpq_node_")]
    for node in ray.nodes()
}
bundles = placement_group_table(group)["bundles_to_node_id"]
print("PLACED", json.dumps([markers[bundles[number]] for number in sorted(bundles)]))
