//! Instructions of SVM, VMX and relatives: a guest that is offered none of them gets #UD.
use guests::exec;
use guests::prelude::*;
use guests::report::{case, fault_case};
use guests::trap::{catch, GP, UD};
use guests::{platform, user};

pub(crate) fn run() {
    svm();
    vmx();
    others();
}

fn svm() {
    // All with EFER.SVME clear, as it is at reset. AMD APM vol. 2, 15.4.
    fault_case("svm.vmrun", UD, None, || exec!("vmrun", in("rax") 0x1000));
    fault_case("svm.vmload", UD, None, || exec!("vmload", in("rax") 0x1000));
    fault_case("svm.vmsave", UD, None, || exec!("vmsave", in("rax") 0x1000));
    fault_case("svm.clgi", UD, None, || exec!("clgi"));
    fault_case("svm.invlpga", UD, None, || exec!("invlpga", in("rax") 0, in("ecx") 0));
    case("svm.stgi", |t| {
        let got = catch(|| exec!("stgi"));
        // Allowed without SVME where SKINIT exists. AMD APM vol. 3, STGI.
        if platform::umbra() || !has(0x8000_0001, 0, |r| r.ecx, 12) {
            t.faults("STGI", got, UD, None);
        } else {
            t.works("STGI with SKINIT offered", got);
        }
    });
    case("svm.skinit", |t| {
        if has(0x8000_0001, 0, |r| r.ecx, 12) {
            return t.skip("CPUID offers SKINIT, which would start something");
        }
        let got = catch(|| exec!("skinit", in("eax") 0));
        t.faults("SKINIT", got, UD, None);
    });
    fault_case("svm.vmmcall", UD, None, || exec!("vmmcall", inout("rax") 0u64 => _));
    case("svm.vmmcall_any_number", |t| {
        for number in [0u64, 1, 5, 0x4000_0000, !0] {
            let got = catch(|| exec!("vmmcall", inout("rax") number => _));
            t.faults("there is no hypercall interface: VMMCALL", got, UD, None);
        }
    });
    case("svm.in_ring_3", |t| {
        // VMRUN, VMLOAD, VMSAVE, STGI, CLGI, SKINIT, INVLPGA: #UD comes before the privilege check's #GP. A guest cannot
        // have EFER.SVME clear (APM vol. 2, 15.5.1), so under SVM the privilege check is all there is.
        if platform::umbra() {
            return t.skip("EFER.SVME is set while a guest runs");
        }
        for last in [0xd8, 0xda, 0xdb, 0xdd, 0xdf] {
            let (fault, _) = user::run(&[0x0f, 0x01, last], Default::default());
            t.faults("an SVM instruction", Err::<(), _>(fault), UD, None);
        }
    });
    case("svm.vmmcall_in_ring_3", |t| {
        let (fault, _) = user::run(&[0x0f, 0x01, 0xd9], Default::default());
        t.faults("VMMCALL", Err::<(), _>(fault), UD, None);
    });
}

fn vmx() {
    let memory = 0u64;
    let pointer = &raw const memory;
    fault_case("vmx.vmcall", UD, None, || exec!(".byte 0x0f, 0x01, 0xc1"));
    fault_case("vmx.vmlaunch", UD, None, || exec!(".byte 0x0f, 0x01, 0xc2"));
    fault_case("vmx.vmresume", UD, None, || exec!(".byte 0x0f, 0x01, 0xc3"));
    fault_case("vmx.vmxoff", UD, None, || exec!(".byte 0x0f, 0x01, 0xc4"));
    fault_case("vmx.vmfunc", UD, None, || exec!(".byte 0x0f, 0x01, 0xd4"));
    fault_case("vmx.vmxon", UD, None, || exec!(".byte 0xf3, 0x0f, 0xc7, 0x37", in("rdi") pointer));
    fault_case("vmx.vmptrld", UD, None, || exec!(".byte 0x0f, 0xc7, 0x37", in("rdi") pointer));
    fault_case("vmx.vmptrst", UD, None, || exec!(".byte 0x0f, 0xc7, 0x3f", in("rdi") pointer));
    fault_case("vmx.vmclear", UD, None, || exec!(".byte 0x66, 0x0f, 0xc7, 0x37", in("rdi") pointer));
    fault_case("vmx.vmread", UD, None, || exec!(".byte 0x0f, 0x78, 0xc1", out("rcx") _, in("rax") 0));
    fault_case("vmx.vmwrite", UD, None, || exec!(".byte 0x0f, 0x79, 0xc1", in("rcx") 0, in("rax") 0));
    fault_case(
        "vmx.invept",
        UD,
        None,
        || exec!(".byte 0x66, 0x0f, 0x38, 0x80, 0x07", in("rdi") pointer, in("rax") 1),
    );
    fault_case(
        "vmx.invvpid",
        UD,
        None,
        || exec!(".byte 0x66, 0x0f, 0x38, 0x81, 0x07", in("rdi") pointer, in("rax") 1),
    );
    case("vmx.cr4_vmxe", |t| {
        if has(1, 0, |r| r.ecx, 5) {
            return t.skip("CPUID offers VMX");
        }
        if platform::bad_cr_write_hangs() {
            return t.skip("QEMU TCG stops at a MOV to CR4 with a reserved bit");
        }
        let got = catch(|| set_cr4(cr4() | 1 << 13));
        t.faults("setting CR4.VMXE", got, GP, Some(0));
    });
    fault_case("smx.getsec", UD, None, || exec!(".byte 0x0f, 0x37", inout("eax") 0 => _, out("rdx") _));
}

fn others() {
    case("other.rdpmc", |t| {
        // No performance counters are offered. AMD says #GP for a counter that is not there; without any, #UD or
        // #GP both say so. It must not return a number, which would be the host's.
        let got = catch(|| exec!("rdpmc", in("ecx") 0, out("eax") _, out("edx") _));
        t.check(
            got.is_err_and(|f| f.vector == GP || f.vector == UD),
            format_args!("#GP or #UD, got {got:?}"),
        );
    });
    case("other.monitor", |t| {
        let memory = 0u64;
        let got = catch(|| exec!("monitor", in("rax") &raw const memory, in("ecx") 0, in("edx") 0));
        if has(1, 0, |r| r.ecx, 3) {
            t.works("MONITOR", got);
        } else {
            t.faults("MONITOR that CPUID does not offer", got, UD, None);
        }
    });
    case("other.mwait", |t| {
        if has(1, 0, |r| r.ecx, 3) {
            return t.skip("CPUID offers MWAIT, which would wait");
        }
        let got = catch(|| exec!("mwait", in("eax") 0, in("ecx") 0));
        t.faults("MWAIT that CPUID does not offer", got, UD, None);
    });
    fault_case("other.ud2", UD, None, || exec!("ud2"));
    fault_case("other.ud1", UD, None, || exec!(".byte 0x0f, 0xb9, 0xc0"));
    fault_case("other.ud0", UD, None, || exec!(".byte 0x0f, 0xff, 0xc0"));
    case("other.rsm", |t| {
        let got = catch(|| exec!("rsm"));
        t.faults("RSM outside system-management mode", got, UD, None);
    });
    case("other.invd_wbinvd", |t| {
        let got = catch(|| exec!("wbinvd"));
        t.works("WBINVD", got);
    });
    case("other.invpcid", |t| {
        if !has(7, 0, |r| r.ebx, 10) {
            return t.skip("no INVPCID");
        }
        let descriptor = [0u64; 2];
        for kind in [1u64, 2, 3] {
            let got = catch(|| exec!("invpcid {}, [{}]", in(reg) kind, in(reg) &descriptor));
            t.works("INVPCID", got);
        }
        let got = catch(|| exec!("invpcid {}, [{}]", in(reg) 4u64, in(reg) &descriptor));
        t.faults("INVPCID of type 4", got, GP, Some(0));
    });
    case("other.pause", |t| {
        (0..10_000).for_each(|_| exec!("pause"));
        t.yes("ten thousand PAUSEs end", true);
    });
}
