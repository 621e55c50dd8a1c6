"""How a report looks: one file a format; text, JSON and its lines, SARIF, KTAP, CSV."""
