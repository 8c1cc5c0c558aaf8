"""`python -m lora_diffusion`, the same as `lora-diffusion`."""

import sys

from lora_diffusion.cli.start import main

sys.exit(main())
