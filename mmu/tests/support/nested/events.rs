//! What L1 and L2 do to translations: to the crate, and to what the reference remembers.
use mmu::{Gva, Invvpid, TlbControl};

use super::super::machines::Machine as Host;
use super::{tdp12, World, CPU};

impl<H: Host> World<H> {
    /// VM entry, or VMRUN, into L2.
    pub fn enter_l2(&mut self, vcpu: usize, control: TlbControl) {
        let ept = self.is_ept();
        let v = &mut self.vcpus[vcpu];
        if std::mem::replace(&mut v.in_l2, true) {
            return;
        }
        let request = match (ept, v.name) {
            (true, 0) => v.tag.vm_entry(None),
            (true, name) => v.tag.vm_entry(Some(name)),
            (false, name) => v.tag.vmrun(name, control),
        };
        let tdp12 = tdp12(&v.below);
        let asid = if ept { 0 } else { v.name };
        let pdptes = tdp12.pdptes(&self.memory.shared(CPU));
        let _ = v.mmus.enter_l2(&tdp12, pdptes, asid);
        let _ = v.mmus.apply(request);
        // What the architecture flushes.
        match (ept, v.name, control) {
            (true, 0, _) => self.forget_linear(vcpu, 0),
            (true, ..) | (false, _, TlbControl::Nothing) => {}
            (false, name, TlbControl::Asid | TlbControl::AsidRetainingGlobals) => {
                self.forget_asid(vcpu, name)
            }
            (false, _, TlbControl::Everything) => {
                for name in [1, 2] {
                    self.forget_asid(vcpu, name);
                }
            }
        }
        let context = self.context(vcpu);
        if self.vcpus[vcpu].live.insert(context) {
            self.remember();
        }
    }

    /// VM exit to L1.
    pub fn leave_l2(&mut self, vcpu: usize) {
        let ept = self.is_ept();
        let v = &mut self.vcpus[vcpu];
        if !std::mem::replace(&mut v.in_l2, false) {
            return;
        }
        let request = match (ept, v.name) {
            (true, 0) => v.tag.vm_exit(None),
            (true, name) => v.tag.vm_exit(Some(name)),
            (false, _) => v.tag.vmexit(),
        };
        let _ = v.mmus.leave_nested();
        let _ = v.mmus.apply(request);
        if ept && v.name == 0 {
            self.forget_linear(vcpu, 0);
        }
    }

    fn forget_linear(&mut self, vcpu: usize, name: u16) {
        self.vcpus[vcpu].linear.retain(|entry| entry.0 != name);
        self.remember();
    }

    fn forget_asid(&mut self, vcpu: usize, asid: u16) {
        let context = self.context(vcpu);
        let v = &mut self.vcpus[vcpu];
        v.nested.retain(|entry| entry.0 .0 != asid);
        v.live.retain(|live| live.0 != asid || *live == context);
        self.forget_linear(vcpu, asid);
    }

    /// INVEPT by L1: of one pointer, or of all.
    pub fn invept(&mut self, vcpu: usize, pointer: Option<u64>) {
        self.leave_l2(vcpu);
        let v = &mut self.vcpus[vcpu];
        let request = match pointer {
            Some(pointer) => v.tag.invept_single(pointer),
            None => v.tag.invept_global(),
        };
        let _ = v.mmus.apply(request);
        v.nested.retain(|entry| pointer.is_some_and(|pointer| entry.0 .1 != pointer & !0xfff));
        self.remember();
    }

    pub fn invvpid(&mut self, vcpu: usize, what: Invvpid) {
        self.leave_l2(vcpu);
        let v = &mut self.vcpus[vcpu];
        let request = v.tag.invvpid(what);
        let _ = v.mmus.apply(request);
        v.linear.retain(|entry| match what {
            Invvpid::Address { vpid, address } => (entry.0, entry.1) != (vpid, address.bits() >> 12),
            Invvpid::Single { vpid } | Invvpid::SingleRetainingGlobals { vpid } => entry.0 != vpid,
            Invvpid::All => entry.0 == 0,
        });
        self.remember();
    }

    pub fn invlpga(&mut self, vcpu: usize, va: u64, asid: u16) {
        self.leave_l2(vcpu);
        let v = &mut self.vcpus[vcpu];
        let request = v.tag.invlpga(Gva::new(va), asid);
        let _ = v.mmus.apply(request);
        v.linear.retain(|entry| (entry.0, entry.1) != (asid, va >> 12));
        self.remember();
    }

    /// L2 flushes an address, or all, of its own: the processor does it, on the tag it runs with.
    pub fn l2_flush(&mut self, vcpu: usize, va: Option<u64>) {
        self.enter_l2(vcpu, TlbControl::Nothing);
        self.ready(vcpu);
        let tag = self.tag(true);
        let v = &mut self.vcpus[vcpu];
        match va {
            Some(va) => v.tlb.flush_page(tag, va >> 12),
            None => v.tlb.flush(tag),
        }
        let name = v.name;
        v.linear.retain(|entry| entry.0 != name || va.is_some_and(|va| entry.1 != va >> 12));
        self.remember();
    }

    /// L1 runs another L2: other tables, or another name.
    pub fn switch(&mut self, vcpu: usize, below: usize, name: u16) {
        self.leave_l2(vcpu);
        (self.vcpus[vcpu].below, self.vcpus[vcpu].name) = (self.belows[below], name);
    }
}
