"""What a network reaches: accuracy, operating points, its comparison with a dense one."""
