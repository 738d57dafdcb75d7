"""Model servers: `build.build_server` chooses one. Standard library only here: `llamacpp_main` runs elsewhere."""
