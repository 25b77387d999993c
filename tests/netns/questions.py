"""Questions that an app asks by hand, so that nothing in between, no library and no cache, changes them.

The lab's resolvers know one name, and what its TXT record says is which of them was asked.
"""

NAME = b"\x03who\x02is\x00"  # as a question on the wire has it: what ends a connection afterwards has not

ASKING = r"""
import struct, threading

def question(number=0x1234, name="who.is", kind=16):
    labels = b"".join(bytes((len(part),)) + part.encode() for part in name.split("."))
    return struct.pack("!HHHHHH", number, 0x0100, 1, 0, 0, 0) + labels + struct.pack("!BHH", 0, kind, 1)

def told(message):
    '''The code of an answer if it is an error, else the text of its first record.'''
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

def who(address, protocol="udp", number=0x1234, port=53):
    '''Which resolver answers; UDP and TCP hear the asked address alone, since they are connected.'''
    if protocol == "tcp":
        with tcp(address, port) as own:
            own.sendall(framed(question(number)))
            answer = unframed(own)
    else:
        with udp(address, port) as own:
            own.send(question(number))
            answer = own.recv(65536)
    assert struct.unpack("!H", answer[:2])[0] == number
    return told(answer)

def checksum(data):
    data += bytes(len(data) % 2)
    return -sum(struct.unpack(f"!{len(data) // 2}H", data)) % 0xFFFF or 0xFFFF

def raw(source, address, payload, port=53):
    '''A datagram from a raw socket, whose look-up of a route has no ports; the answer's payload.'''
    with socket.socket(family(address), socket.SOCK_RAW, socket.IPPROTO_UDP) as own:
        own.settimeout(PATIENCE_S)
        header = struct.pack("!HHH", 40053, port, 8 + len(payload))
        pseudo = b"".join(socket.inet_pton(own.family, end) for end in (source, address))
        pseudo += struct.pack("!HH", 17, 8 + len(payload))
        own.sendto(header + struct.pack("!H", checksum(pseudo + header + payload)) + payload, (address, 0))
        while True:
            answer = own.recv(65536)
            answer = answer if own.family == socket.AF_INET6 else answer[20:]
            if answer[2:4] == struct.pack("!H", 40053):
                return answer[8:]
"""
