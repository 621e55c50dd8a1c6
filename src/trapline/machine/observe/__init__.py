"""What a machine is seen doing: traps recorded, symbols, back traces, last words."""
