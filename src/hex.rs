//! Numbers in hexadecimal digits, for what every exchange writes: `format!` takes ten times as long.

const DIGITS: &[u8; 16] = b"0123456789abcdef";

/// The last `N` digits of a number.
#[must_use]
pub fn digits<const N: usize>(number: u128) -> [u8; N] {
    let mut text = [0; N];
    let mut rest = number;
    for digit in text.iter_mut().rev() {
        *digit = DIGITS[(rest & 0xf) as usize];
        rest >>= 4;
    }
    text
}

/// The same as text.
pub fn push<const N: usize>(text: &mut String, number: u128) {
    text.extend(digits::<N>(number).map(char::from));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_those_of_the_standard_library() {
        for number in [0, 1, 0xa, 0x10, 0xdead_beef, u128::MAX, 0x1234_5678_9abc_def0 << 60] {
            assert_eq!(digits::<32>(number), format!("{number:032x}").as_bytes());
            let mut text = "x".to_owned();
            push::<32>(&mut text, number);
            assert_eq!(text, format!("x{number:032x}"));
        }
        assert_eq!(digits::<4>(0xa_bcde), *b"bcde");
    }
}
