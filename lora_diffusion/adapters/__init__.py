"""The injection core: the only package that touches PEFT."""
