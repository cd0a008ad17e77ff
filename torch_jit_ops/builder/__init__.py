"""From a translation unit to a loaded library: look, lock, look again, compile, load, publish."""
