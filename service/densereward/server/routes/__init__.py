"""HTTP routes, by audience: trainers that score, operators that look after the server."""
