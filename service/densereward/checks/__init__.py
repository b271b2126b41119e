"""Before a model serves: it is loaded, examined for wrong numbers, and refused where one is found."""
