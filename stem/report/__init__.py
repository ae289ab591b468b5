"""What a person looks at: tables, contact sheets, videos side by side, JSON documents."""
