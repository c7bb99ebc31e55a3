"""The switch: its table, its control protocol, its data planes and its agent."""
