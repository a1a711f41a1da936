"""``python -m llama3v`` is the command line."""

import sys

from llama3v.cli import main

sys.exit(main())
