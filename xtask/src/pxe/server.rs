//! Where a tree is served, as far as the machines' boot loaders must be told.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// How files are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TFTP (RFC 1350).
    Tftp,
    /// HTTP (RFC 9110).
    Http,
}

impl Protocol {
    /// Its name in a URL and in GRUB's device names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tftp => "tftp",
            Self::Http => "http",
        }
    }
}

/// A server and the folder on it that holds the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// How it is asked.
    pub protocol: Protocol,
    /// Its name or IPv4 address.
    pub host: String,
    /// The folder: empty, or beginning with `/` and not ending with it.
    pub folder: String,
}

impl From<Ipv4Addr> for Server {
    /// The top folder of the TFTP server at `address`.
    fn from(address: Ipv4Addr) -> Self {
        Self { protocol: Protocol::Tftp, host: address.to_string(), folder: String::new() }
    }
}

impl Server {
    /// A TFTP server: the value of `--server`.
    pub fn tftp(text: &str) -> Result<Self, String> {
        Self::of(text, Protocol::Tftp, "is not TFTP; write tftp://192.0.2.1/FOLDER or an address alone")
    }

    /// An HTTP server: the value of `--http`.
    pub fn http(text: &str) -> Result<Self, String> {
        Self::of(text, Protocol::Http, "is not HTTP; write http://192.0.2.1/FOLDER")
    }

    fn of(text: &str, protocol: Protocol, otherwise: &str) -> Result<Self, String> {
        let server: Self = text.parse()?;
        if server.protocol == protocol {
            Ok(server)
        } else {
            Err(format!("`{text}` {otherwise}"))
        }
    }
}

impl FromStr for Server {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |what: &str| {
            Err(format!(
                "`{text}` {what}; write tftp://192.0.2.1, http://192.0.2.1/FOLDER or an address alone"
            ))
        };
        let (protocol, rest) = match text.split_once("://") {
            None => (Protocol::Tftp, text),
            Some((name, rest)) if name.eq_ignore_ascii_case("tftp") => (Protocol::Tftp, rest),
            Some((name, rest)) if name.eq_ignore_ascii_case("http") => (Protocol::Http, rest),
            Some(_) => return wrong("is neither TFTP nor HTTP, which is what GRUB can load by"),
        };
        let (host, folder) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        if host.contains(':') {
            return wrong("names a port, and GRUB 2.06 knows only the usual ones");
        }
        if host.is_empty() || !host.bytes().all(|b| b.is_ascii_alphanumeric() || b".-".contains(&b)) {
            return wrong("names no server");
        }
        let folder = folder.trim_end_matches('/');
        if !folder.bytes().all(|b| b.is_ascii_alphanumeric() || b"/._-".contains(&b)) {
            return wrong("has a folder with other characters than letters, digits, `/`, `.`, `_`, `-`");
        }
        Ok(Self { protocol, host: host.to_owned(), folder: folder.to_owned() })
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}{}", self.protocol.name(), self.host, self.folder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_read() {
        for (text, shown) in [
            ("192.0.2.1", "tftp://192.0.2.1"),
            ("TFTP://boot.example.org/", "tftp://boot.example.org"),
            ("http://192.0.2.1/a/umbra_1/", "http://192.0.2.1/a/umbra_1"),
        ] {
            assert_eq!(text.parse::<Server>().unwrap().to_string(), shown);
        }
        assert_eq!(Server::from(Ipv4Addr::new(192, 0, 2, 1)).to_string(), "tftp://192.0.2.1");
    }

    #[test]
    fn each_option_has_its_protocol() {
        assert_eq!(Server::tftp("192.0.2.1"), "tftp://192.0.2.1".parse());
        assert!(Server::http("http://192.0.2.1/x").is_ok());
        assert!(Server::tftp("http://192.0.2.1").unwrap_err().contains("is not TFTP"));
        assert!(Server::http("192.0.2.1").unwrap_err().contains("is not HTTP"));
    }

    #[test]
    fn what_is_no_server_is_named() {
        for (text, words) in [
            ("", "names no server"),
            ("ftp://a", "neither TFTP nor HTTP"),
            ("http://a:8080/x", "names a port"),
            ("http:///x", "names no server"),
            ("a b", "names no server"),
            ("a/$(x)", "other characters"),
            ("a\"", "names no server"),
        ] {
            let error = text.parse::<Server>().unwrap_err();
            assert!(error.contains(words) && error.contains("write tftp://"), "{text}: {error}");
        }
    }
}
