"""The subcommands of ``prism-proxy``; each module loads only what its commands need."""
