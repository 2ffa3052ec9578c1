"""What experts see of a text: statistics, their collection, their coverage."""
