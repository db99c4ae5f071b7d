"""Entry point of `python -m llm2clip`, for launchers: `torchrun --nproc_per_node 2 -m llm2clip embed ...`."""

from __future__ import annotations

import sys

from llm2clip.cli import main

sys.exit(main())
