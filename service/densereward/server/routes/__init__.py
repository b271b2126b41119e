"""HTTP routes: `reading` parses bodies, `answering` scores and answers, each other file holds one protocol's routes."""
