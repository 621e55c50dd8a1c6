"""Events injected at every instruction boundary of a window of the running TD."""
