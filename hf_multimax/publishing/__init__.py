"""What is told of a model: results.json, the card made of it, and the way to the Hub."""
