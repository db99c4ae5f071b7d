"""Entry point for `python -m llm2clip`, as in `torchrun --nproc_per_node 2 -m llm2clip embed ...`."""

import sys

from llm2clip.cli import main

sys.exit(main())
