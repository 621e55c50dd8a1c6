"""The software TD: CPU engine, TDX module, VMM, machine, loader and devices."""
