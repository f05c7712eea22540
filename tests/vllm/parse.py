"""Run by vLLM's Python: reads the options of an exported run.sh with vLLM's own parser."""

import json
import re
import shlex
import sys
from pathlib import Path

from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

text = Path(sys.argv[1]).read_text()
found = re.search(r'^exec vllm serve "\$here" (.*) "\$@"$', text, flags=re.M)
assert found is not None
parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
parsed = vars(parser.parse_args(shlex.split(found[1])))
names = json.loads(Path(sys.argv[2]).read_text())["engine"]
print("PARSED", json.dumps({name: parsed[name] for name in names}))
