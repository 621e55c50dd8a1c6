"""A software model of the TDX module, driven by the tables of `trapline.rules`.

The module is between a CPU engine, which it knows only as `trapline.cpu.engine`, and a
VMM, which it knows only as `trapline.tdx.vmm_interface.Vmm`. `module.TdxModule` is the
whole of it:

    TdxModule(vcpu, vmm, config, rules, *, sept, apic, listeners)
        on_exit(exit)            the handler to give to Vcpu.run
        sept                     private and shared state of each page (`sept.Sept`)
        measurements             MRTD and RTMRs (`measurement.Measurements`)
        ve_info, nmi_pending     what the guest has not yet collected
        listening(listener)      a context in which somebody else is told of traps, too
        pend_nmi()               TDH.VP.WR of PEND_NMI: held while VE_INFO is valid
        notify_ept_fault(gpa)    the notification #VE of TDH.VP.ENTER; False if not allowed
        save() / restore(state)  everything the module remembers, to go with Engine.save
"""
