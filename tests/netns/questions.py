"""Questions that an app asks by hand, so that nothing in between, no library and no cache, changes them.

The lab's resolvers know one name, and what its TXT record says is which of them was asked.
"""

ASKING = r'''
import struct

def question(number=0x1234, name="who.is", kind=16):
    labels = b"".join(bytes((len(part),)) + part.encode() for part in name.split("."))
    return struct.pack("!HHHHHH", number, 0x0100, 1, 0, 0, 0) + labels + struct.pack("!BHH", 0, kind, 1)

def told(message):
    """The code of an answer if it is an error, else the text of its first record."""
    if message[3] & 15:
        return {2: "SERVFAIL", 3: "NXDOMAIN", 5: "REFUSED"}.get(message[3] & 15, message[3] & 15)
    at = message.index(b"\x03who\x02is\x00") + 12
    at += 2 if message[at] >= 0xC0 else message[at:].index(0) + 1
    size = message[at + 10]
    return message[at + 11 : at + 11 + size].decode()

def framed(message):
    return struct.pack("!H", len(message)) + message

def unframed(own):
    return read_exactly(own, struct.unpack("!H", read_exactly(own, 2))[0])

def who(address, protocol="udp", number=0x1234):
    """Which resolver answers; UDP and TCP hear the asked address alone, since they are connected."""
    if protocol == "tcp":
        with tcp(address, 53) as own:
            own.sendall(framed(question(number)))
            answer = unframed(own)
    else:
        with udp(address, 53) as own:
            own.send(question(number))
            answer = own.recv(65536)
    assert struct.unpack("!H", answer[:2])[0] == number
    return told(answer)
'''
