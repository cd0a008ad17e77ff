"""What the function and the fake refuse, as the kernel refuses it."""
