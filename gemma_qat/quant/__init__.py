"""The numbers: formats, which weight gets which, straight-through."""
