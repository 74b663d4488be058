import XCTest

@testable import PhonereadyChat

final class CharactersTests: XCTestCase {
    func testCharactersAreWhole() {
        let text = "aé\u{304a}😀"
        for (end, shown) in [([], ""), (Array("😀".utf8.prefix(3)), "\u{fffd}"), ([0xff], "\u{fffd}")] as [([UInt8], String)] {
            var characters = Characters()
            let pieces = (Array(text.utf8) + end).map { characters.of([$0]) } + [characters.rest()]
            XCTAssertEqual(pieces.filter { !$0.isEmpty }, (text + shown).map(String.init))
        }
    }
}
