"""``python -m lora_ext.cli`` is ``lora-ext``."""

import sys

from . import main

sys.exit(main())
