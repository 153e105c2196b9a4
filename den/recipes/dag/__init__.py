"""Networks over one graph: the search of a topology for each task (Choi and Im, CVPR 2023), and its peers."""
