"""The injection core: the only room that touches PEFT."""
