"""One file per operator: the public function, its checks, and its dispatch to a backend."""
