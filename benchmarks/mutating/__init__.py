"""Random changes of graphs: mutations, which injection must detect, and equivalent rewrites, which it must ignore."""
