//! The capabilities that client and server tell each other in VERSION, as JSON.
//!
//! A small reader of its own: what is wanted is a handful of numbers out of at most 64 KiB that a
//! client may have made up, with a bound on nesting, and `serde` stays above the data path.

/// Objects and arrays within each other that are read. The document has three.
const DEPTH_MAX: usize = 16;

/// What a client says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// File descriptors that it takes with one message.
    pub max_msg_fds: u64,
    /// Bytes of data that it takes in one message.
    pub max_data_xfer_size: u64,
    /// It knows REGION_WRITE_MULTI.
    pub write_multiple: bool,
}

impl Default for Capabilities {
    /// Those of a client that says nothing (vfio-user, "Version").
    fn default() -> Capabilities {
        Capabilities { max_msg_fds: 1, max_data_xfer_size: 1 << 20, write_multiple: false }
    }
}

/// Not JSON, or a capability of a wrong kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the version data is not the JSON of the vfio-user document, at byte {at}")]
pub struct BadJson {
    /// Where it stops making sense.
    pub at: usize,
}

impl Capabilities {
    /// Read version data, without the terminating NUL. Names that are not known are passed over.
    pub fn parse(text: &[u8]) -> Result<Capabilities, BadJson> {
        let mut reader = Reader { text, at: 0 };
        let mut capabilities = Capabilities::default();
        if std::str::from_utf8(text).is_err() {
            return Err(reader.bad());
        }
        reader.object(0, &mut |reader, name| match name {
            b"capabilities" => reader.object(1, &mut |reader, name| match name {
                b"max_msg_fds" => {
                    capabilities.max_msg_fds = reader.number()?;
                    Ok(())
                }
                b"max_data_xfer_size" => {
                    capabilities.max_data_xfer_size = reader.number()?;
                    Ok(())
                }
                b"write_multiple" => {
                    capabilities.write_multiple = reader.boolean()?;
                    Ok(())
                }
                _ => reader.skip(2),
            }),
            _ => reader.skip(1),
        })?;
        reader.space();
        if reader.at == text.len() { Ok(capabilities) } else { Err(reader.bad()) }
    }

    /// What we answer to a client with these capabilities, with the terminating NUL: our limits,
    /// and the features that both know.
    pub fn answer(&self, max_msg_fds: usize, max_data_xfer_size: usize, maps: usize) -> Vec<u8> {
        let multiple = if self.write_multiple { r#","write_multiple":true"# } else { "" };
        format!(
            "{{\"capabilities\":{{\"max_msg_fds\":{max_msg_fds},\
             \"max_data_xfer_size\":{max_data_xfer_size},\"max_dma_maps\":{maps},\
             \"pgsizes\":4096{multiple}}}}}\0"
        )
        .into_bytes()
    }
}

struct Reader<'a> {
    text: &'a [u8],
    at: usize,
}

type Member<'a, 'f> = &'f mut dyn FnMut(&mut Reader<'a>, &'a [u8]) -> Result<(), BadJson>;

impl<'a> Reader<'a> {
    fn bad(&self) -> BadJson {
        BadJson { at: self.at }
    }

    fn space(&mut self) {
        while matches!(self.text.get(self.at), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    /// The next byte that is not space.
    fn peek(&mut self) -> Option<u8> {
        self.space();
        self.text.get(self.at).copied()
    }

    fn expect(&mut self, byte: u8) -> Result<(), BadJson> {
        if self.peek() != Some(byte) {
            return Err(self.bad());
        }
        self.at += 1;
        Ok(())
    }

    fn object(&mut self, depth: usize, member: Member<'a, '_>) -> Result<(), BadJson> {
        self.expect(b'{')?;
        self.list(b'}', depth, &mut |reader| {
            let name = reader.string()?;
            reader.expect(b':')?;
            member(reader, name)
        })
    }

    /// Elements with commas between them, up to `end`.
    fn list(
        &mut self,
        end: u8,
        depth: usize,
        element: &mut dyn FnMut(&mut Reader<'a>) -> Result<(), BadJson>,
    ) -> Result<(), BadJson> {
        if depth >= DEPTH_MAX {
            return Err(self.bad());
        }
        if self.peek() == Some(end) {
            self.at += 1;
            return Ok(());
        }
        loop {
            element(self)?;
            match self.peek() {
                Some(b',') => self.at += 1,
                Some(byte) if byte == end => {
                    self.at += 1;
                    return Ok(());
                }
                _ => return Err(self.bad()),
            }
        }
    }

    /// The raw bytes between quotes. None of our names needs an escape.
    fn string(&mut self) -> Result<&'a [u8], BadJson> {
        self.expect(b'"')?;
        let start = self.at;
        loop {
            match self.text.get(self.at) {
                Some(b'"') => break,
                Some(b'\\') => self.at += 2,
                Some(0..=0x1F) | None => return Err(self.bad()),
                Some(_) => self.at += 1,
            }
        }
        self.at += 1;
        Ok(&self.text[start..self.at - 1])
    }

    fn word(&mut self, word: &[u8]) -> bool {
        let is_here = self.text[self.at..].starts_with(word);
        self.at += if is_here { word.len() } else { 0 };
        is_here
    }

    fn boolean(&mut self) -> Result<bool, BadJson> {
        self.space();
        match (self.word(b"true"), self.word(b"false")) {
            (true, _) => Ok(true),
            (_, true) => Ok(false),
            _ => Err(self.bad()),
        }
    }

    /// A number that is not negative and has no fraction.
    fn number(&mut self) -> Result<u64, BadJson> {
        self.space();
        let rest = &self.text[self.at..];
        let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let is_whole = !matches!(rest.get(digits), Some(b'.' | b'e' | b'E'));
        // Checked above: digits are ASCII.
        let value = std::str::from_utf8(&rest[..digits]).ok().and_then(|text| text.parse().ok());
        match value {
            Some(value) if is_whole => {
                self.at += digits;
                Ok(value)
            }
            _ => Err(self.bad()),
        }
    }

    /// Pass over any value.
    fn skip(&mut self, depth: usize) -> Result<(), BadJson> {
        match self.peek() {
            Some(b'{') => self.object(depth, &mut |reader, _| reader.skip(depth + 1)),
            Some(b'[') => {
                self.at += 1;
                self.list(b']', depth, &mut |reader| reader.skip(depth + 1))
            }
            Some(b'"') => self.string().map(|_| ()),
            Some(b'-' | b'0'..=b'9') => {
                let rest = &self.text[self.at..];
                let is_part = |byte: &&u8| {
                    byte.is_ascii_digit() || matches!(byte, b'-' | b'+' | b'.' | b'e' | b'E')
                };
                self.at += rest.iter().take_while(is_part).count();
                Ok(())
            }
            _ if self.word(b"true") || self.word(b"false") || self.word(b"null") => Ok(()),
            _ => Err(self.bad()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Result<Capabilities, BadJson> {
        Capabilities::parse(text.as_bytes())
    }

    #[test]
    fn what_qemu_sends_is_understood() {
        let text = r#"{"capabilities": {"max_msg_fds": 16, "max_data_xfer_size": 1048576,
            "pgsizes": 4096, "max_dma_maps": 65535, "write_multiple": true}}"#;
        let expected =
            Capabilities { max_msg_fds: 16, max_data_xfer_size: 1 << 20, write_multiple: true };
        assert_eq!(parse(text), Ok(expected));
    }

    #[test]
    fn what_is_left_out_has_the_default_and_what_is_unknown_is_passed_over() {
        for text in [
            "{}",
            " {\"capabilities\":{}} ",
            r#"{"x":[1,-2.5e3,"a\"]}",null,{"y":[[],{}]},true],"capabilities":{"z":{"max_msg_fds":9}}}"#,
        ] {
            assert_eq!(parse(text), Ok(Capabilities::default()), "{text}");
        }
        let both = parse(r#"{"capabilities":{"twin_socket":{"supported":true},"max_msg_fds":2}}"#);
        assert_eq!(both.unwrap().max_msg_fds, 2);
    }

    #[test]
    fn what_is_no_such_json_is_refused() {
        for text in [
            "",
            "[]",
            "{",
            "{} x",
            "{\"a\" 1}",
            "{\"a\":}",
            "{\"a\":tru}",
            "{\"a\":1,}",
            r#"{"a"#,
            r#"{"a\"#,
            r#"{"capabilities":1}"#,
            r#"{"capabilities":{"max_msg_fds":-1}}"#,
            r#"{"capabilities":{"max_msg_fds":1.5}}"#,
            r#"{"capabilities":{"max_msg_fds":99999999999999999999}}"#,
            r#"{"capabilities":{"max_msg_fds":"16"}}"#,
            r#"{"capabilities":{"write_multiple":1}}"#,
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
        let deep = format!("{{\"a\":{}1{}}}", "[".repeat(60_000), "]".repeat(60_000));
        assert!(parse(&deep).is_err());
        assert!(Capabilities::parse(b"{\"a\":\"\xFF\"}").is_err());
    }

    #[test]
    fn our_answer_ends_with_a_nul_and_offers_only_what_both_know() {
        let client = Capabilities { write_multiple: true, ..Capabilities::default() };
        let answer = client.answer(16, 65536, 8192);
        assert_eq!(
            answer,
            b"{\"capabilities\":{\"max_msg_fds\":16,\"max_data_xfer_size\":65536,\
              \"max_dma_maps\":8192,\"pgsizes\":4096,\"write_multiple\":true}}\0"
        );
        let parsed = Capabilities::parse(&answer[..answer.len() - 1]).unwrap();
        assert_eq!((parsed.max_msg_fds, parsed.write_multiple), (16, true));
        let answer = Capabilities::default().answer(16, 65536, 8192);
        assert!(!answer.windows(5).any(|part| part == b"write"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Capabilities::parse(&bytes);
        }

        #[test]
        fn any_cut_of_good_text_is_refused(cut in 0usize..60) {
            let text = br#"{"capabilities":{"max_msg_fds":16,"x":[1,{"y":"z"}]}}"#;
            prop_assume!(cut < text.len());
            prop_assert!(Capabilities::parse(&text[..cut]).is_err());
        }
    }
}
