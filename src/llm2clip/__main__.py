"""`python -m llm2clip`, as launchers such as torchrun take it: `torchrun --nproc_per_node 2 -m llm2clip embed ...`."""

from __future__ import annotations

import sys

from llm2clip.cli import main

sys.exit(main())
