//! Keeps the parser off files nested so deep that its recursion would overflow the small stack it has at boot.
use toml_parser::lexer::TokenKind;
use toml_parser::Source;

/// Deepest nesting of brackets, and most dots in a key; umbra.toml has two brackets and no dot.
pub(super) const LIMIT: usize = 8;

/// Offset of the first place that is nested too deep. It runs on the parser's own tokens, so that both see the same
/// strings and comments.
pub(super) fn too_deep(text: &str) -> Option<usize> {
    let mut open = [TokenKind::Eof; LIMIT];
    let mut depth = 0;
    let mut dots = 0;
    for token in Source::new(text).lex() {
        match token.kind() {
            kind @ (TokenKind::LeftSquareBracket | TokenKind::LeftCurlyBracket) => {
                let Some(slot) = open.get_mut(depth) else { return Some(token.span().start()) };
                *slot = kind;
                depth += 1;
            }
            // A bracket that does not match is an error to the parser, and closes nothing.
            TokenKind::RightSquareBracket if open[..depth].ends_with(&[TokenKind::LeftSquareBracket]) => {
                depth -= 1
            }
            TokenKind::RightCurlyBracket if open[..depth].ends_with(&[TokenKind::LeftCurlyBracket]) => {
                depth -= 1
            }
            TokenKind::Dot if dots == LIMIT => return Some(token.span().start()),
            TokenKind::Dot => dots += 1,
            TokenKind::Newline | TokenKind::Equals | TokenKind::Comma => dots = 0,
            _ => {}
        }
    }
    None
}
