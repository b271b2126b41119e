"""HTTP: the application, its routes, and which model answers which request. From a body to a request, and back."""
