//! How one machine is told from others: by MAC address, UUID or serial number, as `--machine KEY=FILE` names it.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// The longest serial number that can be a folder's name here.
const MAX_SERIAL: usize = 64;

/// What one machine is known by. Two spellings of a key are the same key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Key {
    /// The address of the network card that boots, in lower case with hyphens: `52-54-00-12-34-56`.
    Mac(String),
    /// The UUID of the firmware (SMBIOS 3.2, 7.2, type 1), in lower case.
    Uuid(String),
    /// The serial number of the firmware (SMBIOS 3.2, 7.2, type 1), in lower case.
    Serial(String),
}

impl Key {
    /// The name of the machine's folder under `machines`, which `grub.cfg` makes of what the machine says of itself.
    pub fn folder(&self) -> String {
        match self {
            Self::Mac(mac) => format!("mac-{mac}"),
            Self::Uuid(uuid) => format!("uuid-{uuid}"),
            Self::Serial(serial) => format!("serial-{serial}"),
        }
    }
}

impl FromStr for Key {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, value) = text.split_once(':').unwrap_or(("", text));
        let value = value.trim().to_ascii_lowercase();
        match kind.trim().to_ascii_lowercase().as_str() {
            "mac" => mac(&value).map(Self::Mac),
            "uuid" => uuid(&value).map(Self::Uuid),
            "serial" => serial(&value).map(Self::Serial),
            _ => Err(format!(
                "`{text}` names no machine; write mac:52:54:00:12:34:56, uuid:… or serial:… before the ="
            )),
        }
    }
}

fn mac(value: &str) -> Result<String, String> {
    let octets: Vec<&str> = value.split([':', '-']).collect();
    let is_octet = |octet: &&str| octet.len() == 2 && octet.bytes().all(|b| b.is_ascii_hexdigit());
    if octets.len() != 6 || !octets.iter().all(is_octet) {
        return Err(format!("`{value}` is not a MAC address; write six bytes such as 52:54:00:12:34:56"));
    }
    // Bit 0 of the first byte marks a group address, which no card has (IEEE 802, 8.2).
    if u8::from_str_radix(octets[0], 16).is_ok_and(|first| first & 1 != 0) {
        return Err(format!("`{value}` is the address of a group; write that of the machine's network card"));
    }
    Ok(octets.join("-"))
}

fn uuid(value: &str) -> Result<String, String> {
    let parts: Vec<&str> = value.split('-').collect();
    let is_hex = |part: &&str| part.bytes().all(|b| b.is_ascii_hexdigit());
    if parts.iter().map(|part| part.len()).ne([8, 4, 4, 4, 12]) || !parts.iter().all(is_hex) {
        return Err(format!(
            "`{value}` is not a UUID; write one such as 0a1b2c3d-0001-0002-0003-aabbccddeeff"
        ));
    }
    Ok(value.to_owned())
}

fn serial(value: &str) -> Result<String, String> {
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    if value.is_empty() || value.len() > MAX_SERIAL || !value.bytes().all(is_plain) {
        return Err(format!(
            "`{value}` is not a serial number that can name a folder (1 to {MAX_SERIAL} letters, digits, `-`, `_`, `.`); \
             name the machine by its MAC address or UUID"
        ));
    }
    Ok(value.to_owned())
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mac(mac) => write!(f, "mac:{}", mac.replace('-', ":")),
            Self::Uuid(uuid) => write!(f, "uuid:{uuid}"),
            Self::Serial(serial) => write!(f, "serial:{serial}"),
        }
    }
}

/// A machine and what it boots: the value of `--machine`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineFile {
    /// Which machine.
    pub key: Key,
    /// Its umbra.toml or bundle.
    pub file: PathBuf,
}

impl FromStr for MachineFile {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (key, file) = text.split_once('=').unwrap_or((text, ""));
        let key = key.parse()?;
        if file.is_empty() {
            return Err(format!("`{text}` gives {key} no file; write {key}=FILE, an umbra.toml or a bundle"));
        }
        Ok(Self { key, file: file.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_of_a_key_are_one_folder() {
        for (text, folder) in [
            ("mac:52:54:00:12:34:56", "mac-52-54-00-12-34-56"),
            ("MAC:52-54-00-AB-CD-EF", "mac-52-54-00-ab-cd-ef"),
            ("uuid:0A1B2C3D-0001-0002-0003-AABBCCDDEEFF", "uuid-0a1b2c3d-0001-0002-0003-aabbccddeeff"),
            ("Serial:ABC.123_x-9", "serial-abc.123_x-9"),
        ] {
            let key: Key = text.parse().unwrap();
            assert_eq!(key.folder(), folder, "{text}");
            assert_eq!(key.to_string().parse(), Ok(key), "{text}");
        }
    }

    #[test]
    fn what_names_no_machine_is_named() {
        for (text, words) in [
            ("", "names no machine"),
            ("52:54:00:12:34:56", "names no machine"),
            ("host:a", "names no machine"),
            ("mac:52:54:00:12:34", "is not a MAC address"),
            ("mac:52:54:00:12:34:5g", "is not a MAC address"),
            ("mac:525400123456", "is not a MAC address"),
            ("mac:52:54:00:12:34:+6", "is not a MAC address"),
            ("mac:01:00:5e:00:00:01", "address of a group"),
            ("uuid:", "is not a UUID"),
            ("uuid:0a1b2c3d-0001-0002-0003-aabbccddeef", "is not a UUID"),
            ("uuid:0a1b2c3d-0001-0002-0003-aabbccddeefg", "is not a UUID"),
            ("serial:", "is not a serial number"),
            ("serial:a b", "MAC address or UUID"),
            ("serial:../etc", "is not a serial number"),
            ("serial:ä", "is not a serial number"),
        ] {
            let error = text.parse::<Key>().unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn a_machine_has_a_file() {
        let machine: MachineFile = "mac:52:54:00:12:34:56=a=b/umbra.toml".parse().unwrap();
        assert_eq!(machine.key.folder(), "mac-52-54-00-12-34-56");
        assert_eq!(machine.file, PathBuf::from("a=b/umbra.toml"));
        for text in ["serial:x", "serial:x="] {
            let error = text.parse::<MachineFile>().unwrap_err();
            assert!(error.contains("write serial:x=FILE"), "{error}");
        }
        assert!("serial=x".parse::<MachineFile>().unwrap_err().contains("names no machine"));
    }
}
