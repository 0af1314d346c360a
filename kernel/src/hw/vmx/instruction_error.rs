//! Why a VMX instruction failed: VM-instruction error numbers in words. SDM vol. 3, 31.4.

/// What a VM-instruction error number says.
pub const fn describe(error: u32) -> &'static str {
    match error {
        0 => "no error",
        1 => "VMCALL in VMX root operation",
        2 => "VMCLEAR of an invalid physical address",
        3 => "VMCLEAR of the VMXON region",
        4 => "VMLAUNCH of a VMCS that is not clear",
        5 => "VMRESUME of a VMCS that was not launched",
        6 => "VMRESUME after VMXOFF",
        7 => "VM entry with invalid control fields",
        8 => "VM entry with invalid host-state fields",
        9 => "VMPTRLD of an invalid physical address",
        10 => "VMPTRLD of the VMXON region",
        11 => "VMPTRLD of a VMCS with another revision identifier",
        12 => "VMREAD or VMWRITE of a field that this CPU does not have",
        13 => "VMWRITE to a read-only field",
        15 => "VMXON in VMX root operation",
        16 => "VM entry with an invalid executive-VMCS pointer",
        17 => "VM entry with an executive VMCS that was not launched",
        18 => "VM entry whose executive-VMCS pointer is not the VMXON pointer",
        19 => "VMCALL with a VMCS that is not clear",
        20 => "VMCALL with invalid VM-exit control fields",
        22 => "VMCALL with an incorrect MSEG revision identifier",
        23 => "VMXOFF under the dual-monitor treatment of SMIs",
        24 => "VMCALL with invalid SMM-monitor features",
        25 => "VM entry with invalid execution control fields in the executive VMCS",
        26 => "VM entry in the shadow of MOV SS",
        28 => "INVEPT or INVVPID with an invalid operand",
        _ => "a VM-instruction error that the manual does not number",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_of_the_manual_has_its_own_words() {
        let words: std::collections::HashSet<_> = (0..=28).map(describe).collect();
        // 14, 21 and 27 are not numbered, and share theirs.
        assert_eq!(words.len(), 29 - 2);
        assert_eq!(describe(14), describe(u32::MAX));
        assert!(describe(7).contains("control fields"));
    }
}
