"""This machine: device, threads, memory format, arithmetic."""
