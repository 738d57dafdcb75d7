"""What runs inside an allocation: claims shards, keeps the server up, feeds the engine, obeys signals."""
