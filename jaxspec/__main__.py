from jaxspec.cli import main

raise SystemExit(main())
