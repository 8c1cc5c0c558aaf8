"""`python -m lora_diffusion`, the same as `lora-diffusion`."""

import sys

from lora_diffusion.cli.main import main

sys.exit(main())
