"""What is done before a program runs: builds, deployments."""
