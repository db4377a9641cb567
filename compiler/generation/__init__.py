"""Models that generate token by token: recognized, compiled, verified, and driven."""
