"""Long-lived state and the work itself; knows Ray, never Ray Serve."""
