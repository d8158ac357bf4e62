"""The confined child of `rewards.sandbox`: scripts that run by path in a bare interpreter, never as a package."""
