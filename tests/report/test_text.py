import pytest
from hypothesis import given
from hypothesis import strategies as st

import reports
from scan_documents import clean, document, driver, kernel, mapping, site
from trapline.results.scan import AllowedId, Coverage, Frame

MAIL = (
    "> That lists exactly 8 ids",
    "> How many places do those 8 drivers touch MMIO?",
    '> Are there any "real" hardware drivers involved',
    "> What about the APIC or HPET?",
    "> Sean seemed worried about other x86-specific oddities.",
    "> It's with posting a series that masquerades as a full solution",
    "What this scan did not see:",
)


def report(result, verbosity=0):
    return reports.text(result, verbosity).removesuffix("\n")


def flat(result, verbosity=0):
    """The report without its line breaks, to look for sentences in it."""
    return " ".join(report(result, verbosity).split())


def test_the_questions_of_the_mail_are_answered_in_its_order():
    whole = report(document())
    places = [whole.index(question) for question in MAIL]
    assert places == sorted(places)
    assert whole.index("Sites by class and access") > places[-1]


def test_ids_come_with_their_true_names():
    whole = flat(document())
    assert "has 3 ids" in whole
    assert "virtio 9P transport (transitional)" in whole
    assert 'the e-mail says "Virtio FS"' in whole


def test_mmio_is_parted_into_drivers_transport_and_core():
    whole = flat(document())
    assert "The list lets in 2 drivers." in whole
    assert "In the drivers themselves: 0 MMIO instructions, 0 MMIO calls." in whole
    assert "In their transport: 0 MMIO instructions, 1 MMIO call." in whole
    assert "In core code that acts for them: 1 MMIO instruction, 0 MMIO calls." in whole
    assert "virtio_pci_modern_dev transport 0 1 0 0" in whole


def test_ids_that_lead_only_to_the_transport_are_named():
    assert "No driver in this kernel for 1af4:1009 virtio 9P transport (transitional)." in flat(
        document()
    )
    assert "1af4:1000 virtio network card (transitional)." not in flat(document())


def test_a_list_that_lets_nothing_in_is_said_so():
    whole = flat(document(drivers=()))
    assert "Nowhere: no driver of vmlinux and its modules binds to an id of the list." in whole


def test_absent_hardware_drivers_are_said_to_be_absent():
    whole = flat(document())
    assert "e1000 no driver for it in this kernel" in whole
    assert "rtl8139 no driver for it in this kernel" in whole


def test_present_hardware_drivers_are_found_by_their_pci_id():
    e1000 = driver(
        name="e1000",
        bus="pci",
        allowed=False,
        aliases=("pci:v00008086d0000100Esv*sd*bc*sc*i*",),
        sites=300,
        mmio=210,
    )
    whole = flat(document(drivers=(e1000,)))
    assert "e1000 e1000 (module) no 210 300" in whole
    assert "rtl8139 no driver" in whole
    assert "Of 1 PCI driver the list keeps 1 out: 0 built in, 1 module." in whole


def test_the_local_apic_is_not_alone():
    whole = flat(document())
    assert "No. Outside drivers there are 3 MMIO instructions and 0 MMIO calls" in whole
    assert "the local APIC has 1 and 0." in whole


def test_the_local_apic_alone():
    whole = flat(document(sites=(site(subsystem="local APIC"),)))
    assert "Yes. Outside drivers there are 1 MMIO instruction" in whole


def test_refused_forms_are_listed_with_their_reason():
    whole = flat(document())
    assert "The #VE handler cannot emulate 1 of 7 sites, 0 of them MMIO:" in whole
    assert "WBINVD 1 0 virt_exception_kernel() has no case for it" in whole
    assert "The #VE handler can emulate every form that was found." in flat(clean())


def test_what_was_not_seen_is_said():
    blind = Coverage(complete=False, missing=("3 modules have no DWARF.",), advice=("Install it.",))
    whole = flat(document(coverage=blind))
    assert "- 3 modules have no DWARF. - Install it." in whole
    assert "Most plain dereferences of mapped device memory" in whole


def test_a_thousand_broken_modules_do_not_take_the_report_over():
    broken = tuple(f"Module m{number} was not scanned: it is cut off." for number in range(1000))
    whole = report(document(coverage=Coverage(complete=False, missing=broken, advice=())))
    assert whole.count("was not scanned") == 12
    assert "- 988 more, which --format json has." in whole


def test_the_last_line_is_the_verdict():
    assert "Policy: 1 site the #VE handler cannot emulate, 1 built-in driver" in flat(document())
    assert report(clean()).endswith("Policy: nothing found against it.")


def test_serving_drivers_are_not_listed_as_outside_the_list():
    whole = report(document())
    table = whole[whole.index("Built-in drivers outside the list") :].split("\n\n")[0]
    assert "8250" in table
    assert "virtio_pci_modern_dev" not in table


def test_v_adds_lines_and_chains_and_vv_the_evidence():
    brief, verbose, evidence = (report(document(), level) for level in range(3))
    place = "arch/x86/kernel/hpet.c:981: MMIO read 32 bit (readl)"
    chain = "    inlined readl arch/x86/include/asm/io.h:59"
    assert place not in brief
    assert place in verbose
    assert chain in verbose
    assert "8b00  mov (%rax),%eax" not in verbose
    assert "8b00  mov (%rax),%eax" in evidence
    assert ".init.text  id 5d0c1f0a2b3c4d5e" in evidence
    assert "refused: virt_exception_kernel() has no case for it" in evidence


def test_the_inline_chain_reads_from_the_outermost_frame_inwards():
    verbose = report(document(), 1)
    assert verbose.index("    inlined hpet_readl") < verbose.index("    inlined readl")


names = st.text(max_size=120)


@given(names, names, names, st.sampled_from([0, 1, 2]))
def test_never_wider_than_a_mail_whatever_the_image_says(function, file, reason, verbosity):
    frame = Frame(function=function, file=file, line=1)
    result = document(
        kernel=kernel(release=function, build_id=file),
        allow=(AllowedId(id=function, name=file, note=reason),),
        sites=(
            site(
                function=function,
                file=file,
                inlined=(frame,),
                reason=reason,
                emulable=False,
                subsystem=file,
                driver=reason or None,
                section=function,
                origin=file,
                instruction=reason,
            ),
            site(subsystem=function),
        ),
        mappings=(mapping(mapper=function, function=file),),
        drivers=(driver(name=reason, via=(file,), reaches=(function,)), driver(builtin=True)),
        coverage=Coverage(complete=False, missing=(file,), advice=(reason,)),
    )
    for line in reports.text(result, verbosity).splitlines():
        assert len(line) <= 80
        assert line.isascii()
        assert line.isprintable()


@pytest.mark.parametrize("verbosity", [0, 2])
def test_the_last_line_ends(verbosity):
    assert reports.text(document(), verbosity).endswith("the host.\n")


def test_a_module_alone_is_not_called_a_vmlinux():
    alone = kernel(build_id=None, version=None, has_dwarf=False, modules=1)
    assert "no vmlinux, 1 module" in flat(document(kernel=alone))


def test_a_complete_scan_is_not_called_incomplete():
    assert "INCOMPLETE" not in report(document())


def test_no_debug_information_and_no_release():
    bare = kernel(release=None, build_id=None, has_dwarf=False, modules=0)
    blind = Coverage(complete=False, missing=("No DWARF.",), advice=())
    whole = flat(document(kernel=bare, sites=(), mappings=(), drivers=(), coverage=blind))
    assert "scan of Linux (no release)" in whole
    assert "vmlinux without debug information, 0 modules INCOMPLETE: every number" in whole
    assert whole.endswith("Policy: nothing found against it in what was seen.")
    assert "Nowhere: no driver of what was scanned binds" in whole
    assert "No: there is no MMIO outside drivers in what was scanned." in whole
